"""`ig-dist launch`: the processes of a machine, alone or as one of several."""
