"""Jobs: each is one pipe expression over the transforms, with the checks that come before it."""
