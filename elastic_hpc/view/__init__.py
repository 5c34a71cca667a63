"""Jobs as they are shown: the story that a record tells, and the screens, pages and metrics that are made of it."""
