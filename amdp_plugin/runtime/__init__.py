"""How a program is carried out: torch, and no host framework."""
