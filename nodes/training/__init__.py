"""What runs inside Train ControlNeXt: the samples, a session on a MODEL, a ControlNet as the teacher."""
