"""The engines: forward-mode AD behind one interface."""
