"""The demo's load: five conversations of four turns, each with a system prompt of its own.

The order is fixed: all first turns, then all second turns, and so on. Five is odd and there are two workers, so round
robin sends every turn of a conversation to the other worker than the turn before, as it would in any busy fleet.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conversation:
    name: str
    system: str
    questions: tuple[str, str, str, str]


CONVERSATIONS = (
    Conversation(
        "garden",
        "You are a gardener who has looked after the same walled garden for forty years. You know every tree in it by "
        "its own name, and you like to talk about rain, about roses and about the patience that both of them need.",
        (
            "My grandmother left me a small garden behind her house. Nobody has touched it for three summers and the "
            "grass is as high as my knees. There is an old apple tree in the corner. Where should I begin?",
            "I cut the grass yesterday and found a stone path under it, and beside the path a row of roses that are "
            "still alive. They have many dead branches. May I cut them back now or must I wait for spring?",
            "Thank you, I will do it that way. The apple tree has moss on its north side and carried only four apples "
            "this year, all of them small and sour. Is it too old, or can it be helped?",
            "One last thing. My daughter is six and wants a bed of her own, with something in it that she can eat and "
            "something that grows quickly. What would you sow together with her?",
        ),
    ),
    Conversation(
        "sea",
        "You were the mate of a sailing ship and now you tell stories in the harbour. You speak slowly, you remember "
        "every storm by its year, and you never let a listener go home without knowing how the story ended.",
        (
            "Good evening. They told me in the inn that you once sailed around the cape in the middle of the winter "
            "with half of the crew sick below deck. I have time and I would love to hear how that began.",
            "And the captain, what did he say when the second mast broke? I have heard that some captains turn back at "
            "such a moment and that others only laugh and ask for more rope.",
            "I can almost hear the wind. How long did it take until you saw land again, and what did the men do when "
            "somebody called it out from above? Did they believe him at once?",
            "Then tell me how it ended. Did the ship ever sail again, and do you still meet any of the men who were on "
            "board with you in that winter?",
        ),
    ),
    Conversation(
        "kitchen",
        "You are a cook who explains things so that a tired person can follow them after work. You use few words for "
        "what is easy and take your time where dishes usually go wrong, and you never ask for fancy tools.",
        (
            "There are six eggs, a bag of potatoes, two onions and some hard cheese in my kitchen, and four hungry "
            "people will come home in an hour. What can I make of this without going to the shop again?",
            "That sounds good. My pan is old and everything sticks to it, and when I turn the potatoes they fall "
            "apart. What am I doing wrong, and can I do it in the oven instead?",
            "The potatoes are in the oven now. While they are in there, is there anything that I could do with the "
            "onions so that they become sweet and brown, and how do I know when to stop?",
            "It worked and everybody was happy. There is a whole bowl of it left over. How long can I keep it, and "
            "what would you make of it tomorrow so that nobody notices that it is the same dish?",
        ),
    ),
    Conversation(
        "stars",
        "You work at a small observatory on a hill and show the night sky to visitors. You love questions from people "
        "who have never looked through a telescope, and you answer them with pictures from daily life, not numbers.",
        (
            "Last night I stood on my balcony and saw a very bright light low in the west just after sunset. It did "
            "not blink and it did not move. My neighbour says it was a star. Was it one?",
            "I looked again today with my old field glasses and I think it was not round, but more like a tiny half "
            "moon. Can that be true, or are my glasses simply broken?",
            "How far away is it, then? Please do not tell me the number, I would forget it before I am home. Tell me "
            "how long I would have to drive if there were a road to it.",
            "I would like to show it to my son tomorrow. At what time should we be outside, where should we look, and "
            "what else could we find up there before he becomes tired?",
        ),
    ),
    Conversation(
        "letters",
        "You help people to write letters that they have put off for too long. You ask what they really want to say, "
        "you find plain words for it, and you keep every letter shorter than its writer had feared.",
        (
            "I have not written to my brother for eleven years. We quarrelled about our father's house and both of us "
            "said things that were not true. Now I hear that he is ill. How does one begin such a letter?",
            "That is a good beginning. Should I mention the house at all? I do not want it any more, but if I leave "
            "it out he may think that I am only waiting to speak of it later.",
            "I have now written half a page. It sounds stiff, as if a lawyer had helped me. He used to laugh a lot, "
            "and we had a boat when we were boys. Could that come into the letter?",
            "I think it is nearly done. How do I end it so that he feels free to answer and free not to answer? And "
            "should I write it by hand or is that too much?",
        ),
    ),
)

TURNS = 4
