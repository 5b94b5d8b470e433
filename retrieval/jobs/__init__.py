"""Jobs that make the artifacts: from a dataset and a trained encoder to a published snapshot."""
