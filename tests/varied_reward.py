"""A reward of one's own, by path, that a random model gets different values of: so that groups are live."""


def share_of_digits(completions, **kwargs):
    return [sum(character.isdigit() for character in text) / 6 for text in completions]
