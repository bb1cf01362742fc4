"""The sweep: every operation that can be found, through every second-order call, against differences."""
