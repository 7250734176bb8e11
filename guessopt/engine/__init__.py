"""Running the closure: forward-mode passes, the search for the examples, the audit, and the undoing of all of it."""
