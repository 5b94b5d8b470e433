"""Stores of users' events."""
