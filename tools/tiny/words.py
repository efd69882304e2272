"""Words on the signs of the tiny world, those of training and others that are kept from it. Data alone."""

CHINESE_WORDS = (
    "出口 入口 停车场 书店 药店 饭店 咖啡 茶馆 医院 学校 银行 邮局 超市 公园 电梯 楼梯 厕所 洗手间 小心 "
    "注意安全 禁止吸烟 请勿拍照 营业中 休息中 欢迎光临 开放时间 售票处 候车室 图书馆 博物馆 电影院 体育馆 "
    "游泳池 花店 水果 面包 牛肉面 火车站 地铁 公交车 机场 酒店 会议室 办公室 教室 食堂 宿舍 操场 前台 "
    "收银台 问讯处 失物招领 请排队 请安静 当心触电 北京 上海 广州 南京 春天 夏天 秋天 冬天 东门 西门 南门 "
    "北门 平安 快乐 福 新年好"
)
LATIN_WORDS = (
    "EXIT OPEN CLOSED CAFE HOTEL BANK PARK STOP PUSH PULL TAXI BUS SHOP SALE FOOD TEA COFFEE BOOKS MUSIC "
    "CINEMA SCHOOL HOSPITAL LIBRARY MUSEUM STATION TICKETS TOILET LIFT STAIRS DANGER WARNING PRIVATE "
    "QUIET WELCOME FRUIT BREAD FISH PIZZA FLOWERS GARDEN BEACH POOL GYM OFFICE POLICE FIRE WATER MILK ICE "
    "NORTH SOUTH EAST WEST"
)
NEW_CHINESE_WORDS = (
    "出入口 书房 药房 茶水间 牛奶 公交站 安静 小心火车 图书室 游客 北京站 南京路 上海花园 水果店 冬休 "
    "花茶 天平 银行楼 东站 西饭堂 平安路 机电 开门 游乐场 学前班 面馆 车库 夏花"
)
NEW_LATIN_WORDS = (
    "KIOSK BAKERY MARKET ZOO JUICE ROOM EXPRESS VIEW RICE LOBBY DINER OUTLET WEEKDAY KEYS HARBOUR JAZZ QUAY SQUASH"
)
# Characters that training strings are also made of at random, so that reading out is copying, not knowing words.
CHINESE_CHARACTERS = "".join(sorted({each for each in CHINESE_WORDS + NEW_CHINESE_WORDS if each != " "}))
LATIN_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SMALL_LETTERS = LATIN_CHARACTERS.lower()
DIGITS = "0123456789"


def numbers(first: int) -> list[str]:
    """Numbers of one to four digits; every fifth is of one list, the others of the other."""
    return [str((7 * index * index + 31 * index + 3) % 9973) for index in range(first, 400, 5)]


TRAINED_NUMBERS = sorted(set(numbers(0) + numbers(1) + numbers(2) + numbers(3)))
NEW_NUMBERS = sorted(set(numbers(4)) - set(TRAINED_NUMBERS))
TRAINED_WORDS = {"Chinese": CHINESE_WORDS.split(), "Latin": LATIN_WORDS.split(), "digits": TRAINED_NUMBERS}
NEW_WORDS = {"Chinese": NEW_CHINESE_WORDS.split(), "Latin": NEW_LATIN_WORDS.split(), "digits": NEW_NUMBERS}
