"""Event logs in, jagged sequences out: ingest, datasets, vocabulary, splits, batches, the synthetic world."""
