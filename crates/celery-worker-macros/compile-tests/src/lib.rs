//! Nothing but its tests, in `tests/ui`: incorrect tasks, each with the messages that the compiler shows.
