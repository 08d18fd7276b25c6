"""Example configurations, installed beside the code so that `sightline demo` finds its own."""
