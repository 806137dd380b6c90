"""Templates of matrix memories: linear and swla."""
