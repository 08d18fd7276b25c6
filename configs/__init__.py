"""Example configurations. They are installed with the code, because `sightline demo` reads one of them."""
