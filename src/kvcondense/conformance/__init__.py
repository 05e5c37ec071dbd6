"""Does an implementation do the right thing, and would we notice if it did not: scenarios and mutants."""
