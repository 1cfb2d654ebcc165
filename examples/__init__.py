"""Short runs on real data: each trains, logs, asks and prints."""
