"""Running the closure: in forward mode, to find where the examples lie, to audit a step; and undoing its effects."""
