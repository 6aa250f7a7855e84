"""Conversations that teach the demo model to answer: made from the text files in this folder.

Each kind of conversation is a function `(Maker) -> list of (question, answer)`. They are drawn by chance and joined, so
that the model sees chats that change their subject and must look back to know what is being talked about.
"""

import random
from collections.abc import Callable
from typing import Final

from demo_training.corpus import Corpus, Entry
from demo_training.phrases import Topic, read_phrases, read_small_talk
from demo_training.stories import tell_story
from demo_training.tokens import Message

Turn = tuple[str, str]

SYSTEM_PROMPT_BYTES: Final = 1000
"""About how long the longest system prompts become; the median is a third of it."""


PHRASES: Final = read_phrases()
SMALL_TALK: Final = read_small_talk()


class Maker:
    """Draws conversations; everything that is random comes from `dice`."""

    def __init__(self, corpus: Corpus, topics: list[Topic], dice: random.Random) -> None:
        self.corpus = corpus
        self.topics = topics
        self.dice = dice

    def conversation(self) -> list[Message]:
        topic = self.dice.choice(self.topics)
        has_system = self.dice.random() < 0.6
        if has_system and self.dice.random() < 0.7:
            turns = topic_turns(self, topic, told_by_system=True)
        else:
            turns = []
            for _ in range(self.dice.choice((1, 1, 2, 3, 6))):
                (kind,) = self.dice.choices(list(KINDS), weights=list(KINDS.values()))
                turns += kind(self)
        messages: list[Message] = [("system", self.system_prompt(topic))] if has_system else []
        for question, answer in turns:
            messages += [("user", question), ("assistant", answer)]
        return messages

    def system_prompt(self, topic: Topic) -> str:
        """Who the assistant is, how it talks, and sometimes a lot of text that has nothing to do with the questions."""
        pick = self.dice.choice
        prompt = pick((f"You are {topic.speaker}.", f"You are {topic.speaker} and you talk about {topic.name}."))
        if self.dice.random() < 0.5:
            prompt += f" You know a lot about {' and about '.join(self.dice.sample(topic.words, 2))}."
        length = self.dice.random() ** 2 * SYSTEM_PROMPT_BYTES
        while len(prompt) < length:
            prompt += " " + pick((*PHRASES["manners"], pick(self.corpus.paragraphs)[:300], pick(topic.facts)))
        return prompt

    def entry(self, kind: str = "") -> Entry:
        while True:
            entry = self.dice.choice(self.corpus.dictionary)
            if kind in {"", entry.kind}:
                return entry


def topic_turns(maker: Maker, topic: Topic | None = None, *, told_by_system: bool = False) -> list[Turn]:
    """Questions about one subject: first by name, then only "and then?"; no answer of the model repeats a sentence."""
    pick, chance = maker.dice.choice, maker.dice.random
    topic = topic or pick(maker.topics)
    facts = list(topic.facts)
    maker.dice.shuffle(facts)
    turns: list[Turn] = []
    while facts and len(turns) < 4 and (not turns or chance() < 0.75):
        if turns and chance() < 0.35:
            question = pick(PHRASES["follow ups"])
        elif told_by_system and chance() < 0.4:
            question = pick(PHRASES["vague questions"])
        elif chance() < 0.4:
            question = pick(PHRASES["questions"]).format(pick((topic.name, *topic.words)))
        else:
            question = musing(maker, topic)
        said, facts = facts[: (length := pick((1, 2, 2, 3)))], facts[length:]
        opening = pick(PHRASES["openings"]) + " " if chance() < 0.25 else ""
        closing = " " + pick(PHRASES["closings"]) if chance() < 0.1 else ""
        turns.append((question, opening + " ".join(said) + closing))
    return turns


def musing(maker: Maker, topic: Topic) -> str:
    """A question as people write it: two or three sentences in which the words of the topic occur."""
    pick = maker.dice.choice
    words = maker.dice.sample(topic.words, min(3, len(topic.words)))
    sentences = [pick(PHRASES["remarks"]).format(word, pick(PHRASES["people"])) for word in words[: pick((1, 2, 2, 3))]]
    if maker.dice.random() < 0.3:
        sentences.insert(0, pick(PHRASES["forewords"]))
    return " ".join([*sentences, pick((*PHRASES["vague questions"], pick(PHRASES["questions"]).format(words[0])))])


def dictionary_turns(maker: Maker) -> list[Turn]:
    entry = maker.entry()
    word = entry.word
    article = "an" if word[0] in "aeiouAEIOU" else "a"
    questions = ["What does {0} mean?", "What is the meaning of {0}?", "Define {0}.", "Explain the word {0}."]
    if entry.kind == "noun":
        questions += ["What is {1} {0}?", "What is {0}?", "Do you know what {0} is?", "Tell me about {0}."]
    question = maker.dice.choice(questions).format(word, article)
    answer = {
        "noun": maker.dice.choice(
            (f"{word.capitalize()}: {entry.meaning}.", f"The word {word} means {entry.meaning}.")
        ),
        "verb": f"To {word} means to {entry.meaning}.",
        "adj": f"The word {word} says that something is {entry.meaning}.",
    }[entry.kind]
    turns = [(question, answer)]
    if entry.examples:
        example = entry.examples[0].rstrip(".")
        sentence = example[0].upper() + example[1:] + "."
        turns.append(
            (maker.dice.choice(("Give me an example.", f"Use {word} in a sentence.", "For example?")), sentence)
        )
    return turns


def book_turns(maker: Maker) -> list[Turn]:
    """Go on with a text."""
    text = maker.dice.choice(maker.corpus.paragraphs)
    middle = text.find(". ", len(text) // 4) + 2
    if middle < 2 or len(text) - middle < 40:
        return story_turns(maker)
    order = maker.dice.choice(("Continue this text: ", "Go on: ", "How does this go on? ", "Please continue: "))
    return [(order + text[: middle - 1], text[middle : middle + 400].rsplit(". ", 1)[0].rstrip(".") + ".")]


def story_turns(maker: Maker) -> list[Turn]:
    hero = maker.dice.choice(PHRASES["animals"])
    asked = maker.dice.choice(
        ("Tell me a story about a {}.", "I would like to hear a story with a {} in it.", "A {} story!")
    )
    turns = [(asked.format(hero), tell_story(maker.dice, hero))]
    if maker.dice.random() < 0.3:
        hero = maker.dice.choice(PHRASES["animals"])
        turns.append(
            (
                maker.dice.choice(("Another one, with a {}.", "And one about a {}?")).format(hero),
                tell_story(maker.dice, hero),
            )
        )
    return turns


def name_turns(maker: Maker) -> list[Turn]:
    """Something to remember, perhaps something else, and the question for it."""
    name, pick = maker.dice.choice(PHRASES["names"]), maker.dice.choice
    if maker.dice.random() < 0.6:
        first = (
            pick(("My name is {}.", "Hello, I am {}.", "Call me {}.", "Hi! My name is {}.")).format(name),
            f"Nice to meet you, {name}.",
        )
        last = (pick(("What is my name?", "Do you remember my name?", "Who am I?")), f"Your name is {name}.")
    else:
        word = maker.entry("noun").word
        first = (
            pick(("Remember the word {}.", "The secret word is {}.")).format(word),
            f"I will remember the word {word}.",
        )
        last = (pick(("What was the word?", "Which word did I tell you?")), f"The word was {word}.")
    between = small_talk(maker) if maker.dice.random() < 0.5 else []
    return [first, *between, last]


def sum_turns(maker: Maker) -> list[Turn]:
    a, b = maker.dice.randint(0, 20), maker.dice.randint(0, 20)
    if maker.dice.random() < 0.3:
        last = maker.dice.randint(3, 12)
        return [(f"Count to {last}.", ", ".join(map(str, range(1, last + 1))) + ".")]
    question = maker.dice.choice(("What is {0} plus {1}?", "{0} + {1} = ?", "How much is {0} and {1}?"))
    return [(question.format(a, b), f"{a} plus {b} is {a + b}.")]


def small_talk(maker: Maker) -> list[Turn]:
    talk = maker.dice.choice(SMALL_TALK)
    return [(maker.dice.choice(talk.questions), maker.dice.choice(talk.answers))]


KINDS: Final[dict[Callable[[Maker], list[Turn]], float]] = {
    topic_turns: 0.38,
    small_talk: 0.14,
    dictionary_turns: 0.18,
    book_turns: 0.08,
    story_turns: 0.10,
    name_turns: 0.08,
    sum_turns: 0.04,
}
