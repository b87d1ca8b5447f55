"""Layouts of packed codes and of gradient messages."""
