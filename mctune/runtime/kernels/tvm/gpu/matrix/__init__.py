"""Launchers of matrix memories."""
