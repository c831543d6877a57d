"""A method for flowdistill from another package: see :mod:`flowdistill_method_example.pair_regression`."""
