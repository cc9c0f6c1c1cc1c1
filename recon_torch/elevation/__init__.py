"""The elevation of a turntable video, estimated from its views (Sec. 3.3)."""
