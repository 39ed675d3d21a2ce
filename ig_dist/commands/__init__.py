"""The verbs of ``ig-dist``, a module each. Thin: what a verb does is imported when it runs, so that help is quick."""
