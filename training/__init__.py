"""A run in progress: set-up, schedule, state, guard, rollback, optimizer, saving, planning."""
