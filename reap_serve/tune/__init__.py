"""The smallest plan within the limits that the user sets, found by trying plans as masks in a running engine."""
