"""Named alone (``pytest tests/faults``), the whole folder runs, the longer tests with it."""
