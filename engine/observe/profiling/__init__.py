"""Where the time of a step goes: phases, their recording, and the table of a profile."""
