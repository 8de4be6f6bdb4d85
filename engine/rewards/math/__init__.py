"""The reward of verifiable problems: Math-Verify with its holes closed, behind killable processes."""
