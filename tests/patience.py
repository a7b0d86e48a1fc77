"""How long a test waits for a program before it calls it hung."""

# Seconds, far beyond what any of them takes on a busy machine: this ends a hang, it times nothing.
PATIENCE = 1800
