"""What ablations measure: functions of options that return numbers by name."""
