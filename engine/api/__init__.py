"""What a script may do with the engine, and what the commands do: resolve, check, train, evaluate, score, plan, register. The
names that are promised are those of `engine` itself; this package prints nothing and parses no arguments."""
