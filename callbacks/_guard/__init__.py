"""How `NonFiniteGuard` finds what is broken."""
