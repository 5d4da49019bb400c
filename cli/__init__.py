"""What the four commands do alike: flags, output, errors, exit codes."""
