"""Plain torch: the judges of every other backend."""
