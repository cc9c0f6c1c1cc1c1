"""What a backbone is told: prompts and pictures become a `Conditioning`."""
