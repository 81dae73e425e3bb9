"""Small real things that stand in for big ones."""
