"""How long a run will take, before anything is started: a cost model of sampling, training and all between, and the search for
a better split of the GPUs."""
