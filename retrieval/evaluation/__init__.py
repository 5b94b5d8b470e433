"""Offline evaluation: ranks of held-out items, metrics with intervals, recall of an index, reports and plots."""
