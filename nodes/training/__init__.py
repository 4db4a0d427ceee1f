"""The training inside Train ControlNeXt: samples, a session on a MODEL, a teacher, kept states."""
