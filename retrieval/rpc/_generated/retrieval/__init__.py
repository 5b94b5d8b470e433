"""Stubs written by `protos/generate.py`; nothing here is edited by hand."""
