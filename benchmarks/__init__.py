"""Programs that check an answer, then time it."""
