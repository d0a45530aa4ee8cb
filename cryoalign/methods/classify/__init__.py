"""Classification by likelihood: expectation maximisation with splitting and merging."""
