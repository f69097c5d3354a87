"""The floor everything stands on: errors, names, budgets, layers, choices, policies, run folders. No torch here."""
