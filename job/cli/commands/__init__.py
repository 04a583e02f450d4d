"""The commands: their options and help. What they do is imported only when they run."""
