"""Files: those of users and strangers, read with a bound and strictly; files that survive a kill."""
