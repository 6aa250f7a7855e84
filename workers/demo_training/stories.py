"""Very short stories from a small grammar: a hero, a wish, an obstacle, a helper, an end."""

import random

from demo_training.phrases import read_phrases

PHRASES = read_phrases()


def tell_story(dice: random.Random, hero: str) -> str:
    def pick(name: str) -> str:
        return dice.choice(PHRASES[name])

    wish, fulfilled = pick("wishes").split(" / ")
    helper = dice.choice([animal for animal in PHRASES["animals"] if animal != hero])
    return (
        f"{pick('beginnings')} {with_article(pick('adjectives'))} {hero} lived {pick('places')}. "
        f"The {hero} wanted to {wish}, but {pick('obstacles')}. "
        f"Then it met {with_article(helper)}. The {helper} {pick('help')}. "
        f"{pick('turning points')} the {hero} {fulfilled}. {pick('endings')}"
    )


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiouAEIOU' else 'a'} {word}"
