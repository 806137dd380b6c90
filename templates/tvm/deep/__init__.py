"""Templates of deep memories: dla and titans."""
