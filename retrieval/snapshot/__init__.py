"""Snapshots: the immutable, checked, versioned folders through which jobs and servers meet."""
