"""One step: closure -> plan -> guesses -> gradients."""
