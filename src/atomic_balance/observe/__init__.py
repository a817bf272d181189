"""What can be seen from outside: numbers and log lines."""
