"""What a compiled program will do on a machine that is not there: its FLOPs, memory, messages, and the time they take."""
